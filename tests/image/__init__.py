"""The Dockerfile's own steps, carried out without Docker: see build.py for what that is and what it is not."""
