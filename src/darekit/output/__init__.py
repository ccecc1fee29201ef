# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights: config, tokenizer, card and recipe. Small text and JSON only."""
