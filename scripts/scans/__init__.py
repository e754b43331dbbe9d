"""From a folder of scans to examples: find, inspect, transform, keep and draw. Imports running only."""
