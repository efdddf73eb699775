# SPDX-License-Identifier: Apache-2.0
"""Floor 3: checkpoint directories, read with torch only and without running code that a file names."""
