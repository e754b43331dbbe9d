"""The mathematics and the networks. Imports running only, and never ignite: MONAI Deploy has none."""
