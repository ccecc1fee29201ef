# SPDX-License-Identifier: Apache-2.0
"""What goes with the weights: config, tokenizer, chat template, other files; and whose they are."""
