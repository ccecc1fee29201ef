# SPDX-License-Identifier: Apache-2.0
"""Write the page again from the results that are there: ``python -m real.page``."""

from __future__ import annotations

import json
from pathlib import Path

from real.page import RESULTS, write_page

if __name__ == "__main__":
    page = Path(__file__).resolve().parents[2] / "docs" / "real"
    write_page(json.loads((page / RESULTS).read_text()), page)
