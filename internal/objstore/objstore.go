// Package objstore is what Cloud Code needs of an object store. Open gives one
// that speaks S3, NewMemory one for tests; both pass objstoretest.
package objstore

import (
	"context"
	"errors"
	"iter"
	"time"
)

// Error classes. An implementation wraps them with %w and a text that says what
// was tried and what to do.
var (
	ErrNotFound     = errors.New("object not found")
	ErrPrecondition = errors.New("object has changed")           // If-Match or If-None-Match did not hold
	ErrNoBucket     = errors.New("bucket does not exist")        // or is not the caller's to see
	ErrDenied       = errors.New("object store refuses the keys") // wrong keys, or not allowed to do this
	ErrRegion       = errors.New("wrong region")
	ErrUnavailable  = errors.New("object store unavailable") // no connection, time-outs, 5xx, throttling: try again later
	ErrUnsupported  = errors.New("object store cannot do this")
)

// Object is what is known of an object without its content.
type Object struct {
	Key          string
	Size         int64
	ETag         string // opaque; as PutOptions.IfMatch takes it
	LastModified time.Time
	// Prefix is set in a listing with a delimiter where Key stands for all keys
	// that begin with it; then the rest is zero.
	Prefix bool
}

// PutOptions of a Put. At most one condition.
type PutOptions struct {
	IfMatch     string // only if the object has this ETag
	IfNoneMatch bool   // only if there is no object
	ContentType string
}

// Store is one bucket. All methods are safe for concurrent use; each makes its own
// retries of what may work at once again, bounded to some seconds, and never
// retries a conditional Put whose outcome is unknown: that is ErrUnavailable, and
// the caller looks.
type Store interface {
	// Get returns the object and its content. Returns ErrNotFound.
	Get(ctx context.Context, key string) ([]byte, Object, error)
	// GetRange returns n bytes from offset on; less than n is an error. Returns ErrNotFound.
	GetRange(ctx context.Context, key string, offset, n int64) ([]byte, error)
	// Stat returns ErrNotFound.
	Stat(ctx context.Context, key string) (Object, error)
	// Put writes an object whole or not at all. Returns ErrPrecondition.
	Put(ctx context.Context, key string, data []byte, o PutOptions) (Object, error)
	// List yields the objects whose key begins with prefix, by key, starting behind
	// after. With a delimiter (one character), keys that have it behind the prefix are folded.
	List(ctx context.Context, prefix, delimiter, after string) iter.Seq2[Object, error]
	// Delete removes objects; one that is not there is no error.
	Delete(ctx context.Context, keys ...string) error
}
