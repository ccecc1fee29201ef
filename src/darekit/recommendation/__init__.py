# SPDX-License-Identifier: Apache-2.0
"""How much may be dropped: `rates` from the size of deltas, `calibration` from a model's own inputs, `advice` on both,
`shrinkage` for DAREx's q."""
