"""One module a schema revision, in order. What has been released is never changed."""
