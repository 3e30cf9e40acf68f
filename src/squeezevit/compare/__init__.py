"""Every method on one's own model and images, at equal multiply-adds: what stays, what is right, and how long it takes.

ranks.py    which of several methods can be told from which, by paired tests
job.py      measuring
page.py     the results as one page, sorted by what the reader chooses
"""

from squeezevit.compare.job import Asked, compare, largest
from squeezevit.compare.page import write_page
from squeezevit.compare.ranks import ranks

__all__ = ["Asked", "compare", "largest", "ranks", "write_page"]
