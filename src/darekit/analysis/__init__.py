# SPDX-License-Identifier: Apache-2.0
"""What fine-tuned models look like beside their base and each other: tables, pairs, curves, drawings."""
