package fleet

import "errors"

// Error classes. Everything below the API wraps one of them with %w; the API
// turns them into gRPC codes in one place.
var (
	ErrNotFound           = errors.New("not found")
	ErrAlreadyExists      = errors.New("already exists")
	ErrInvalidArgument    = errors.New("invalid argument")
	ErrFailedPrecondition = errors.New("failed precondition")
	ErrAborted            = errors.New("aborted")      // lost a race: read again, then retry
	ErrStale              = errors.New("stale")        // an old generation or registration
	ErrUnavailable        = errors.New("unavailable")  // try again later
	ErrResourceExhausted  = errors.New("out of space") // disk or quota
)
