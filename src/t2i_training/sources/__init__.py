"""Models and data that flags name, as local folders or hub names, checked without torch."""
