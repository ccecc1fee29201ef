# SPDX-License-Identifier: Apache-2.0
"""A recipe meets the headers of real checkpoints: alignment, settings, steps, checks."""
