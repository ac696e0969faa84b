package storage

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// careless is a store that ignores what its fields say.
type careless struct {
	*objstore.Memory
	ifMatch, ifNoneMatch bool
	refuse               error
	stale                bool
}

func (c careless) Put(ctx context.Context, key string, data []byte, o objstore.PutOptions) (objstore.Object, error) {
	if c.refuse != nil {
		return objstore.Object{}, c.refuse
	}
	if c.ifMatch {
		o.IfMatch = ""
	}
	if c.ifNoneMatch {
		o.IfNoneMatch = false
	}
	return c.Memory.Put(ctx, key, data, o)
}

func (c careless) Get(ctx context.Context, key string) ([]byte, objstore.Object, error) {
	data, o, err := c.Memory.Get(ctx, key)
	if c.stale && strings.HasPrefix(string(data), "two ") {
		data = append([]byte("one "), data[4:]...)
	}
	return data, o, err
}

func TestCheckSeesThroughTheStore(t *testing.T) {
	for _, c := range []struct {
		name  string
		store careless
		class error
		words string
	}{
		{"good", careless{}, nil, ""},
		{"no If-None-Match", careless{ifNoneMatch: true}, objstore.ErrUnsupported, "If-None-Match"},
		{"no If-Match", careless{ifMatch: true}, objstore.ErrUnsupported, "If-Match"},
		{"neither", careless{ifMatch: true, ifNoneMatch: true}, objstore.ErrUnsupported, "conditional writes"},
		{"read only", careless{refuse: objstore.ErrDenied}, objstore.ErrDenied, "cannot be created"},
		{"old reads", careless{stale: true}, objstore.ErrUnsupported, "at once"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.store.Memory = objstore.NewMemory()
			err := check(t.Context(), c.store, true)
			if !errors.Is(err, c.class) || err != nil && !strings.Contains(err.Error(), c.words) {
				t.Errorf("got %v", err)
			}
			if left := c.store.Keys(); len(left) > 0 {
				t.Errorf("left in the bucket: %q", left)
			}
			c.store.ResetStats()
			if err := check(t.Context(), c.store, false); err != nil {
				t.Errorf("not deep: %v", err)
			}
			if s := c.store.Stats(); s.Total() != 1 || s.Requests[objstore.OpList] != 1 {
				t.Errorf("not deep: %v", s.Requests)
			}
		})
	}
}

// The probe is removed also when the caller has no time left.
func TestCheckCleansUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m := objstore.NewMemory()
	m.FailAfter = func(op, _ string) error {
		if op == objstore.OpPut {
			cancel()
		}
		return nil
	}
	if err := check(ctx, m, true); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if left := m.Keys(); len(left) > 0 {
		t.Errorf("left in the bucket: %q", left)
	}
	undeletable := objstore.NewMemory()
	undeletable.Fail = func(op, _ string) error {
		if op == objstore.OpDelete {
			return objstore.ErrDenied
		}
		return nil
	}
	if err := check(t.Context(), undeletable, true); !errors.Is(err, objstore.ErrDenied) || !strings.Contains(err.Error(), "deleted") {
		t.Errorf("got %v", err)
	}
}

func TestWhatIsInAFolder(t *testing.T) {
	for _, c := range []struct {
		keys           []string
		folder         string
		original, root bool
	}{
		{nil, "", false, false},
		{[]string{"workspace/project/a"}, "", true, false},
		{[]string{"workspace/"}, "", true, false},
		{[]string{"main/.opencode/config/opencode.json"}, "main", true, false},
		{[]string{"main/.opencode/config/opencode.json"}, "", false, false},
		{[]string{"main/other", "workspaces/x", "mainly/workspace/x"}, "main", false, false},
		{[]string{"main/.cloudcode/v1/packs/00/x"}, "main", false, true},
		{[]string{".cloudcode/v1/packs/00/x"}, "main", false, false},
	} {
		m := objstore.NewMemory()
		for _, k := range c.keys {
			if _, err := m.Put(t.Context(), k, nil, objstore.PutOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := WrittenByOriginal(t.Context(), m, c.folder); err != nil || got != c.original {
			t.Errorf("%q in %q: by the original: %v, %v", c.keys, c.folder, got, err)
		}
		if got, err := IsRoot(t.Context(), m, c.folder); err != nil || got != c.root {
			t.Errorf("%q in %q: a root: %v, %v", c.keys, c.folder, got, err)
		}
	}
	m := objstore.NewMemory()
	m.Fail = func(string, string) error { return objstore.ErrUnavailable }
	if _, err := WrittenByOriginal(t.Context(), m, "x"); !errors.Is(err, objstore.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
