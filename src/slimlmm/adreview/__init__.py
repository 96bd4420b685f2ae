"""AdReview: a deterministic generator of advertisement creatives with questions and short answers.

from slimlmm import adreview
adreview.write(Path("data/adreview"), train=12_000, val=1_000, test=2_400, seed=0)
picture, rows = adreview.creative(7, "train", seed=0)
"""

from slimlmm.adreview.answers import Row
from slimlmm.adreview.build import Summary, creative, write
from slimlmm.adreview.catalogue import TASKS, VERSION

__all__ = ["TASKS", "VERSION", "Row", "Summary", "creative", "write"]
