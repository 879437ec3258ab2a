from benchmarks.checkout import import_refocus

import_refocus()
