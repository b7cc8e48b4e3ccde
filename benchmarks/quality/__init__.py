"""Quality of the methods on edits with a known answer: ``python -m benchmarks.quality --help``.

Each method has a file with one function, from a :class:`~benchmarks.quality.bench.Bench` to a
:class:`~benchmarks.quality.section.Section`; their table is in ``__main__``. ``edits`` has the edits that several
methods are compared on, ``figures`` the statistics.
"""
