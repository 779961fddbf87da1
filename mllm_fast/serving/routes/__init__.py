"""The routes of the HTTP interface, one router for each resource."""
