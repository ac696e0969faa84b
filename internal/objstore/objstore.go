// Package objstore is what Cloud Code needs of an object store. Open gives one
// that speaks S3, NewMemory one for tests; both pass objstoretest.
package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"
)

// Error classes. An implementation wraps them with %w and a text that says what
// was tried and what to do.
var (
	ErrNotFound     = errors.New("object not found")
	ErrPrecondition = errors.New("object has changed")            // If-Match or If-None-Match did not hold
	ErrNoBucket     = errors.New("bucket does not exist")         // or is not the caller's to see
	ErrDenied       = errors.New("object store refuses the keys") // wrong keys, or not allowed to do this
	ErrRegion       = errors.New("wrong region")
	ErrUnavailable  = errors.New("object store unavailable") // no connection, time-outs, 5xx, throttling: try again later
	ErrUnsupported  = errors.New("object store cannot do this")
	// ErrTooLarge is an ErrUnsupported: there is more than can be what was asked for.
	ErrTooLarge = fmt.Errorf("%w: too large", ErrUnsupported)
)

// MaxObject is the most that Put takes and Get gives. Who has the keys of a bucket,
// or answers in its name, must not be able to fill this machine's memory.
const MaxObject = 96 << 20

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
	// IfMatch: only if the object has this ETag. S3 makes the ETag from the
	// content: an object that was changed and changed back matches again, so
	// content that is written with this condition must never repeat.
	IfMatch     string
	IfNoneMatch bool // only if there is no object
	ContentType string
}

// Store is one bucket. All methods are safe for concurrent use; each makes its own
// retries of what may work at once again, bounded to some seconds, and never
// retries a conditional Put whose outcome is unknown: that is ErrUnavailable, and
// the caller looks.
//
// Every method may also return any other class, but ErrPrecondition from Put alone.
type Store interface {
	// Get returns the object and its content. Returns ErrNotFound, ErrTooLarge.
	Get(ctx context.Context, key string) ([]byte, Object, error)
	// GetRange returns n bytes from offset on; less than n is an error, which wraps
	// io.ErrUnexpectedEOF. Returns ErrNotFound.
	GetRange(ctx context.Context, key string, offset, n int64) ([]byte, error)
	// Stat returns ErrNotFound, also for a missing bucket: S3 does not tell them apart there.
	Stat(ctx context.Context, key string) (Object, error)
	// Put writes an object whole or not at all. Returns ErrPrecondition, ErrTooLarge.
	// The Object it returns may lack LastModified.
	Put(ctx context.Context, key string, data []byte, o PutOptions) (Object, error)
	// List yields the objects whose key begins with prefix, by key, starting behind
	// after. With the delimiter "/", keys that have it behind the prefix are folded;
	// the empty delimiter folds nothing; there is no other. An error ends it.
	List(ctx context.Context, prefix, delimiter, after string) iter.Seq2[Object, error]
	// Delete removes objects; one that is not there is no error.
	Delete(ctx context.Context, keys ...string) error
}

// GetUpTo is Get for an object of which more than limit bytes are known to be wrong:
// they are ErrTooLarge, and are not read where the store can tell before.
func GetUpTo(ctx context.Context, s Store, key string, limit int64) ([]byte, Object, error) {
	if b, ok := s.(bounded); ok {
		return b.getUpTo(ctx, key, limit)
	}
	data, o, err := s.Get(ctx, key)
	if err == nil && int64(len(data)) > limit {
		return nil, Object{}, tooLarge(key, int64(len(data)), limit)
	}
	return data, o, err
}

type bounded interface {
	getUpTo(ctx context.Context, key string, limit int64) ([]byte, Object, error)
}

func tooLarge(key string, size, limit int64) error {
	return fmt.Errorf("%w: %s has %d bytes or more, and %d can be", ErrTooLarge, key, size, limit)
}

// Close gives up what a store holds on to, which are idle connections. The store
// stays usable.
func Close(s Store) error {
	if c, ok := s.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// WithPrefix returns a store that shows the objects below a prefix, by the rest of
// their keys. The prefix is put before keys as it is: for a folder it ends with a slash.
func WithPrefix(s Store, prefix string) Store {
	if prefix == "" {
		return s
	}
	if p, ok := s.(*prefixed); ok {
		return &prefixed{s: p.s, prefix: p.prefix + prefix}
	}
	return &prefixed{s: s, prefix: prefix}
}

type prefixed struct {
	s      Store
	prefix string
}

func (p *prefixed) cut(o Object) Object {
	o.Key = strings.TrimPrefix(o.Key, p.prefix)
	return o
}

func (p *prefixed) Get(ctx context.Context, key string) ([]byte, Object, error) {
	data, o, err := p.s.Get(ctx, p.prefix+key)
	return data, p.cut(o), err
}

func (p *prefixed) getUpTo(ctx context.Context, key string, limit int64) ([]byte, Object, error) {
	data, o, err := GetUpTo(ctx, p.s, p.prefix+key, limit)
	return data, p.cut(o), err
}

func (p *prefixed) GetRange(ctx context.Context, key string, offset, n int64) ([]byte, error) {
	return p.s.GetRange(ctx, p.prefix+key, offset, n)
}

func (p *prefixed) Stat(ctx context.Context, key string) (Object, error) {
	o, err := p.s.Stat(ctx, p.prefix+key)
	return p.cut(o), err
}

func (p *prefixed) Put(ctx context.Context, key string, data []byte, o PutOptions) (Object, error) {
	put, err := p.s.Put(ctx, p.prefix+key, data, o)
	return p.cut(put), err
}

func (p *prefixed) List(ctx context.Context, prefix, delimiter, after string) iter.Seq2[Object, error] {
	if after != "" {
		after = p.prefix + after
	}
	return func(yield func(Object, error) bool) {
		for o, err := range p.s.List(ctx, p.prefix+prefix, delimiter, after) {
			if !yield(p.cut(o), err) {
				return
			}
		}
	}
}

func (p *prefixed) Delete(ctx context.Context, keys ...string) error {
	full := make([]string, len(keys))
	for i, k := range keys {
		full[i] = p.prefix + k
	}
	return p.s.Delete(ctx, full...)
}

func (p *prefixed) Close() error { return Close(p.s) }
