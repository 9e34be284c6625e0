#!/usr/bin/env python3
"""Look inside focal modulation: gates, modulators, receptive fields, and why a box was found."""

import sys

if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        from focalnet_det.predict.look_inside import main

        main()
    sys.exit(0)
