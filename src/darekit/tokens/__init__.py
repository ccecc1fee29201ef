# SPDX-License-Identifier: Apache-2.0
"""Making a tokenizer of others, as data: which tokens there are, under which ids, and the files that say so."""
