"""From files to files: the command line, pairs and cohorts, bundles, the demo."""
