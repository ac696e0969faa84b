package checkpoint

import "errors"

// Error classes. Errors of the object store pass through, wrapped.
var (
	ErrNotFound = errors.New("checkpoint not found")
	// ErrFenced: a newer owner has the session's head. Nothing of it may be written any more.
	ErrFenced = errors.New("another owner has this session's checkpoints")
	// ErrDamaged: an object is not what was written. The text names it.
	ErrDamaged = errors.New("damaged")
	// ErrKey: encrypted with another key, or not encrypted where a key is given.
	ErrKey = errors.New("wrong encryption key")
	// ErrExists: there is something already where a new thing was to be.
	ErrExists = errors.New("exists already")
)
