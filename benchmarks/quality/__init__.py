"""How good the methods are on edits with a known answer: ``python -m benchmarks.quality --help``.

One file per method, each a function from a :class:`~benchmarks.quality.bench.Bench` to a
:class:`~benchmarks.quality.section.Section`; the table of them is in ``__main__``. ``edits`` holds the edits that
several methods are compared by, ``figures`` the statistics.
"""
