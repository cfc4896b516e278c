"""What inverses and log-determinants of linear flows cost: counted, timed over their size, and set beside the promise.

``layers.py`` is the table; ``count.py`` counts, ``measure.py`` times, ``run.py`` is the command, ``page.py`` and
``picture.py`` tell it in ``docs/linear-flows.md``. ``bars.py`` times a few calls against what others write.
"""
