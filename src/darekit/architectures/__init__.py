# SPDX-License-Identifier: Apache-2.0
"""What names of tensors mean: groups, tying, depth. Every table of names is in here."""
