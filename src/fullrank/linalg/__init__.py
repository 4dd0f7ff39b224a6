"""Dense linear algebra that every verb shares: leading singular vectors, bases, spectra, solves.

Errors here are plain ``ValueError``: nothing below this package knows of fullrank's own.
"""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.linalg.bases import orthonormal_basis as orthonormal_basis
    from fullrank.linalg.gram import gram_spectrum as gram_spectrum
    from fullrank.linalg.sampled import SampledSpectrum as SampledSpectrum
    from fullrank.linalg.sampled import sampled_spectrum as sampled_spectrum
    from fullrank.linalg.svd import SVD as SVD
    from fullrank.linalg.svd import randomized_svd as randomized_svd
    from fullrank.linalg.svd import subspace_iteration as subspace_iteration
    from fullrank.linalg.svd import truncated_svd as truncated_svd
    from fullrank.linalg.sylvester import solve_sylvester as solve_sylvester

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["SVD", "randomized_svd", "subspace_iteration", "truncated_svd"], "svd"),
        **dict.fromkeys(["SampledSpectrum", "sampled_spectrum"], "sampled"),
        "gram_spectrum": "gram",
        "orthonormal_basis": "bases",
        "solve_sylvester": "sylvester",
    },
)
