# SPDX-License-Identifier: Apache-2.0
"""Which tensors of base and models correspond: names as the loader knows them, ties, fused experts, vocabularies."""
