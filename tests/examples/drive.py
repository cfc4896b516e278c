"""Runs an example as ``python example.py ...`` would, and writes down what its ``main`` returned.

``drive.py numbers example.py arguments...``: the numbers go to ``numbers-RANK.json``.
"""

import json
import os
import runpy
import sys
from pathlib import Path

_, numbers, *sys.argv = sys.argv
found = runpy.run_path(sys.argv[0])["main"]()
Path(f"{numbers}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
