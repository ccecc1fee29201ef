# SPDX-License-Identifier: Apache-2.0
"""Plots, as PNG and SVG: `style` is how they look, the others draw what one command found. The only place with
matplotlib."""
