"""taut's benchmark: ``python bench/run.py``. See ``bench/run.py --help``."""
