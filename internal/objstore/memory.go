package objstore

import (
	"bytes"
	"context"
	"crypto/md5" // what S3 servers make ETags from
	"encoding/hex"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Operations, as Memory's hooks and counters name them.
const (
	OpGet      = "get"
	OpGetRange = "getrange"
	OpStat     = "stat"
	OpPut      = "put"
	OpList     = "list"
	OpDelete   = "delete"
)

// Memory is a Store for tests. Set its fields before use; the hooks are called
// without locks held, so that they may use the store.
type Memory struct {
	// Fail, if it returns an error, makes an operation fail before it does anything.
	// Keys of a Delete are asked for one by one; the key of a List is its prefix.
	Fail func(op, key string) error
	// FailAfter makes an operation fail after it was done: its outcome is unknown
	// to the caller.
	FailAfter func(op, key string) error
	// Latency of each operation.
	Latency time.Duration
	// Now is the store's own clock; nil: time.Now.
	Now func() time.Time

	mu      sync.Mutex
	objects map[string]memoryObject
	stats   Stats
}

type memoryObject struct {
	data []byte
	Object
}

// Stats counts what a store was asked for, failures included.
type Stats struct {
	Requests map[string]int // by operation
	BytesIn  int64          // content that was put
	BytesOut int64          // content that was read
}

// Total is the number of all requests.
func (s Stats) Total() int {
	n := 0
	for _, c := range s.Requests {
		n += c
	}
	return n
}

var _ Store = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{objects: map[string]memoryObject{}} }

// Stats since the start or the last ResetStats.
func (m *Memory) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.stats
	s.Requests = maps.Clone(s.Requests)
	return s
}

// ResetStats sets all counters to zero.
func (m *Memory) ResetStats() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats = Stats{}
}

// Keys are all keys, sorted.
func (m *Memory) Keys() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.objects))
}

// Damage changes an object's content behind the back of everybody.
func (m *Memory) Damage(key string, change func(data []byte) []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.objects[key]
	if !ok {
		return fmt.Errorf("%w: %s", ErrNotFound, key)
	}
	o.data = change(bytes.Clone(o.data))
	o.Size = int64(len(o.data))
	m.objects[key] = o
	return nil
}

// begin counts a request, waits for the latency and asks Fail.
func (m *Memory) begin(ctx context.Context, op string, keys ...string) error {
	m.mu.Lock()
	if m.stats.Requests == nil {
		m.stats.Requests = map[string]int{}
	}
	m.stats.Requests[op]++
	m.mu.Unlock()
	if m.Latency > 0 {
		t := time.NewTimer(m.Latency)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	if err := ctx.Err(); err != nil {
		return contextError(op, err)
	}
	return ask(m.Fail, op, keys...)
}

func ask(hook func(op, key string) error, op string, keys ...string) error {
	if hook == nil {
		return nil
	}
	for _, k := range keys {
		if err := hook(op, k); err != nil {
			return err
		}
	}
	return nil
}

func (m *Memory) now() time.Time {
	if m.Now != nil {
		return m.Now()
	}
	return time.Now()
}

func (m *Memory) get(key string) (memoryObject, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.objects[key]
	if !ok {
		return memoryObject{}, fmt.Errorf("%w: %s", ErrNotFound, key)
	}
	return o, nil
}

func (m *Memory) sent(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.BytesOut += int64(n)
}

// Get implements Store.
func (m *Memory) Get(ctx context.Context, key string) ([]byte, Object, error) {
	return m.getUpTo(ctx, key, MaxObject)
}

func (m *Memory) getUpTo(ctx context.Context, key string, limit int64) ([]byte, Object, error) {
	if err := m.begin(ctx, OpGet, key); err != nil {
		return nil, Object{}, err
	}
	o, err := m.get(key)
	if err != nil {
		return nil, Object{}, err
	}
	if o.Size > limit {
		return nil, Object{}, tooLarge(key, o.Size, limit)
	}
	m.sent(len(o.data))
	return bytes.Clone(o.data), o.Object, ask(m.FailAfter, OpGet, key)
}

// GetRange implements Store.
func (m *Memory) GetRange(ctx context.Context, key string, offset, n int64) ([]byte, error) {
	if err := m.begin(ctx, OpGetRange, key); err != nil {
		return nil, err
	}
	o, err := m.get(key)
	if err != nil {
		return nil, err
	}
	if err := checkRange(key, offset, n, o.Size); err != nil {
		return nil, err
	}
	m.sent(int(n))
	return bytes.Clone(o.data[offset : offset+n]), ask(m.FailAfter, OpGetRange, key)
}

func checkRange(key string, offset, n, size int64) error {
	if offset < 0 || n < 0 {
		return fmt.Errorf("%w: range of %d bytes at %d", ErrUnsupported, n, offset)
	}
	if offset > size || n > size-offset {
		return shortError(key, offset, n, size)
	}
	return nil
}

func shortError(key string, offset, n, size int64) error {
	return fmt.Errorf("object %s is cut off: it has %d bytes, and %d are wanted at %d: %w", key, size, n, offset, io.ErrUnexpectedEOF)
}

// Stat implements Store.
func (m *Memory) Stat(ctx context.Context, key string) (Object, error) {
	if err := m.begin(ctx, OpStat, key); err != nil {
		return Object{}, err
	}
	o, err := m.get(key)
	if err != nil {
		return Object{}, err
	}
	return o.Object, ask(m.FailAfter, OpStat, key)
}

// Put implements Store.
func (m *Memory) Put(ctx context.Context, key string, data []byte, opts PutOptions) (Object, error) {
	if err := checkKey(OpPut, key); err != nil {
		return Object{}, err
	}
	if err := opts.check(key); err != nil {
		return Object{}, err
	}
	if len(data) > MaxObject {
		return Object{}, tooLarge(key, int64(len(data)), MaxObject)
	}
	if err := m.begin(ctx, OpPut, key); err != nil {
		return Object{}, err
	}
	sum := md5.Sum(data)
	o := memoryObject{data: bytes.Clone(data), Object: Object{
		Key: key, Size: int64(len(data)), ETag: hex.EncodeToString(sum[:]), LastModified: m.now(),
	}}
	m.mu.Lock()
	m.stats.BytesIn += int64(len(data))
	old, exists := m.objects[key]
	switch {
	case opts.IfNoneMatch && exists:
		m.mu.Unlock()
		return Object{}, fmt.Errorf("%w: %s is there already", ErrPrecondition, key)
	case opts.IfMatch != "" && (!exists || old.ETag != opts.IfMatch):
		m.mu.Unlock()
		return Object{}, fmt.Errorf("%w: %s", ErrPrecondition, key)
	}
	if m.objects == nil {
		m.objects = map[string]memoryObject{}
	}
	m.objects[key] = o
	m.mu.Unlock()
	return o.Object, ask(m.FailAfter, OpPut, key)
}

func (o PutOptions) check(key string) error {
	if o.IfMatch != "" && o.IfNoneMatch {
		return fmt.Errorf("%w: put of %s with two conditions", ErrUnsupported, key)
	}
	return nil
}

// List implements Store.
func (m *Memory) List(ctx context.Context, prefix, delimiter, after string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		if err := checkDelimiter(delimiter); err != nil {
			yield(Object{}, err)
			return
		}
		if err := m.begin(ctx, OpList, prefix); err != nil {
			yield(Object{}, err)
			return
		}
		// As S3 does it: what is listed is one moment's state, at least of a page.
		for _, o := range m.snapshot(prefix, delimiter, after) {
			if err := ctx.Err(); err != nil {
				yield(Object{}, contextError(OpList, err))
				return
			}
			if !yield(o, nil) {
				return
			}
		}
		if err := ask(m.FailAfter, OpList, prefix); err != nil {
			yield(Object{}, err)
		}
	}
}

func (m *Memory) snapshot(prefix, delimiter, after string) []Object {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []Object
	last := after
	for _, key := range slices.Sorted(maps.Keys(m.objects)) {
		rest, ok := strings.CutPrefix(key, prefix)
		if !ok {
			continue
		}
		o := m.objects[key].Object
		if delimiter != "" {
			if i := strings.Index(rest, delimiter); i >= 0 {
				o = Object{Key: prefix + rest[:i+1], Prefix: true}
			}
		}
		if o.Key > last || last == "" {
			list = append(list, o)
			last = o.Key
		}
	}
	return list
}

func checkDelimiter(d string) error {
	if d != "" && d != "/" {
		return fmt.Errorf("%w: list with delimiter %q", ErrUnsupported, d)
	}
	return nil
}

// Delete implements Store.
func (m *Memory) Delete(ctx context.Context, keys ...string) error {
	if len(keys) == 0 {
		return nil
	}
	if err := m.begin(ctx, OpDelete, keys...); err != nil {
		return err
	}
	m.mu.Lock()
	for _, k := range keys {
		delete(m.objects, k)
	}
	m.mu.Unlock()
	return ask(m.FailAfter, OpDelete, keys...)
}

// contextError is what an operation returns whose context ended: the store may be
// fine, but a caller that gave it a time knows only that it did not answer in it.
func contextError(op string, err error) error {
	if err == context.DeadlineExceeded { //nolint:errorlint // as Context.Err returns it
		return fmt.Errorf("%w: no answer to %s in time: %w", ErrUnavailable, op, err)
	}
	return fmt.Errorf("%s: %w", op, err)
}
