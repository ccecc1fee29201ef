# SPDX-License-Identifier: Apache-2.0
"""Making packs and what is made of them: writing, unpacking, exporting, sharing."""
