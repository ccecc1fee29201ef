# SPDX-License-Identifier: Apache-2.0
"""A real language model, from PyPI alone: fine-tuned, dropped, merged, packed. ``make real``, or ``python -m real``."""
