"""What a run achieved: terminal tables and a self-contained HTML page."""
