# SPDX-License-Identifier: Apache-2.0
"""`python -m darekit.cli`."""

from darekit.cli import main

main()
