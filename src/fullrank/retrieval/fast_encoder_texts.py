"""Texts that the packed forward passes are calibrated on and checked with.

They are written for this purpose and fixed, so that what a model computes does not depend on
whose documents it sees first. Prose, questions, code, tables, several scripts, long and short:
what matters is that every range that activations take occurs.
"""

from __future__ import annotations

CALIBRATION = (
    "",
    "a",
    "?!",
    "singular value decomposition",
    "How do I sort a list of dictionaries by a key?",
    "Compute the eigenvalues of a symmetric matrix.",
    "weather in Lisbon next weekend",
    "The patient was given 40 mg of the drug twice a day; after two weeks the pain had eased and "
    "no side effects were reported, but blood pressure stayed high.",
    "Return evenly spaced numbers over a specified interval.\n\nParameters\n----------\nstart : "
    "float\n    First value.\nstop : float\n    Last value, unless endpoint is False.\nnum : int, "
    "optional\n    Number of samples to make; 50 if absent.\n\nReturns\n-------\nsamples : "
    "ndarray\n    num values, equally far apart.\n\nExamples\n--------\n>>> spaced(2.0, 3.0, "
    "num=5)\narray([2.  , 2.25, 2.5 , 2.75, 3.  ])",
    "def merge(left, right):\n    out = []\n    while left and right:\n        source = left if "
    "left[0] <= right[0] else right\n        out.append(source.pop(0))\n    return out + left + "
    "right",
    "SELECT name, COUNT(*) AS orders FROM customers JOIN orders ON customers.id = "
    "orders.customer_id WHERE orders.total > 99.50 GROUP BY name ORDER BY orders DESC LIMIT 10;",
    "Noise in transistor amplifiers at low frequencies: measurements of the spectrum between one "
    "and ten thousand cycles per second are compared with a theory of surface recombination. The "
    "agreement is good for germanium and only fair for silicon.",
    "Boundary layer transition on a swept wing was observed in flight at Mach numbers up to 0.8. "
    "Cooling the surface delayed it; roughness near the leading edge brought it forward.",
    "The court held that the contract was void because neither party had signed the second page, "
    "and ordered the deposit of 12,000 euros to be paid back with interest from 3 March 2019.",
    "Preheat the oven to 200 degrees. Mix flour, salt and yeast, add lukewarm water, knead for "
    "ten minutes and let the dough rest under a cloth until it has doubled in size.",
    "Shares fell 3.2 % on Tuesday after the company cut its forecast for the third time this "
    "year; analysts had expected sales of $4.1bn.",
    "She closed the door quietly, stood for a while in the dark hall and listened to the rain. "
    "Nobody had told him yet, she thought, and perhaps nobody would.",
    "lol no way!!! did u see what happened last nite?? cant believe it :D #game",
    "https://example.org/a/b?id=42&lang=en user@example.com C:\\temp\\log.txt 192.0.2.1",
    "Warning: connection reset by peer (errno 104); retrying in 5 s, attempt 3 of 8 ...",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 3.14159 2.71828 1e-7 -0.5 1,000,000",
    "| name | score | rank |\n|------|-------|------|\n| abc  | 0.91  | 1    |\n"
    "| xyz  | 0.17  | 2 |",
    "Die Katze schläft auf dem warmen Ofen, während draußen der Schnee fällt.",
    "Le conseil municipal a décidé de reporter les travaux jusqu'à l'été prochain.",
    "El tren sale a las ocho y media de la mañana desde el andén número cuatro.",
    "Поезд отправляется завтра утром, билеты можно купить на вокзале.",
    "图书馆每天早上九点开门，晚上八点关门。",
    "図書館は毎朝九時に開きます。",
    "المكتبة مفتوحة كل يوم من الساعة التاسعة صباحا",
    "again and again " * 12,
    "The integral converges if and only if the exponent is greater than one: to see this, compare "
    "it with the sum over n of 1/n^p, bound each term from above and below, and let the number of "
    "terms grow. For p equal to one the partial sums grow like log n, so there is no limit; for "
    "any larger p the tail after N terms is at most N^(1-p)/(p-1), which tends to zero. The same "
    "argument works for functions that fall monotonically, and it fails for those that oscillate, "
    "as the example sin(x)/x shows: its integral exists, that of its absolute value does not.",
    "Low-rank approximation replaces a matrix by the product of two thin ones. Among all matrices "
    "of rank r, the one made of the r largest singular values is nearest in the spectral and in "
    "the Frobenius norm. When inputs are not spread evenly, weighing the error by their "
    "covariance gives factors that change the outputs least.",
)

CHECK = (
    "Which planet has the largest moons?",
    "Return the cumulative sum of the elements along an axis.\n\nIf no axis is given, the array is "
    "flattened first. Overflow is silent for integers.",
    "A method is described for measuring the dielectric constant of liquids at microwave "
    "frequencies; results for water and benzene agree with earlier values.",
    "for key, value in sorted(counts.items(), reverse=True):\n    print(f'{key}: {value:.2f}')",
    "The museum is closed on Mondays. Tickets cost 12 euros, children under ten enter free.",
    "Il libro che ho comprato ieri racconta la storia di una famiglia di pescatori.",
    "gradient descent",
    "Users reported that the page stayed empty after signing in. The cause was a cache that kept "
    "answers for ten minutes, errors among them; it now keeps none of those. Restart the server "
    "to make the change take effect, then check that the counter of failed requests stays at 0.",
)
