"""Read the embedded corpora from the installed packages and compare them with the manifest: `python -m prunelib.text`"""

import sys

from prunelib.text.embedded import main

sys.exit(main())
