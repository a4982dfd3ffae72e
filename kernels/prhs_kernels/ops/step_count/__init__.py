"""What the layers of a decode step read and kept, counted on the device."""
