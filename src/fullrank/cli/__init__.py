"""The command line: ``fullrank see | train | shrink | order | serve | demo | methods``.

Commands import what they need when they run, so that ``--help`` is instant.
"""
