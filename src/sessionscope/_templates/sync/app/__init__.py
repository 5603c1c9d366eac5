"""The application: business in `crud`, the web side in `main`, its Database in `database`."""
