"""Run trained generators on images."""
