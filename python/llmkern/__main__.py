"""`python -m llmkern` is the command line."""

import sys

from llmkern_cli import main

sys.exit(main())
