# SPDX-License-Identifier: Apache-2.0
"""From steps to bytes: tiles, stages and merges on a few threads. Knows arrays and sources, no file and no recipe."""
