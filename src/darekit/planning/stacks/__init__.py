# SPDX-License-Identifier: Apache-2.0
"""Slices of layers put one upon another: where each tensor comes from, and the config that says so."""
