"""Inner updates: the stateful rule that runs inside a subspace (or on the whole gradient).

An inner update sees the small arrays of several matrices at once, as lists, so that one kernel
does the elementwise work of all of them.
"""

from fullrank.optim.inner.adafactor import Adafactor as Adafactor
from fullrank.optim.inner.adamw import AdamW as AdamW
from fullrank.optim.inner.batch import Batch as Batch
from fullrank.optim.inner.batch import InnerUpdate as InnerUpdate
from fullrank.optim.inner.lion import Lion as Lion
from fullrank.optim.inner.momentum import Momentum as Momentum
from fullrank.optim.inner.rmsprop import RMSprop as RMSprop
