package objstore_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

func TestMemoryFails(t *testing.T) {
	m := objstore.NewMemory()
	broken := errors.New("broken")
	var asked []string
	m.Fail = func(op, key string) error {
		asked = append(asked, op+" "+key)
		if key == "bad" {
			return broken
		}
		return nil
	}
	if _, err := m.Put(t.Context(), "bad", nil, objstore.PutOptions{}); !errors.Is(err, broken) {
		t.Errorf("put: %v", err)
	}
	if _, err := m.Put(t.Context(), "good", []byte("12345"), objstore.PutOptions{}); err != nil {
		t.Errorf("put: %v", err)
	}
	if err := m.Delete(t.Context(), "good", "bad"); !errors.Is(err, broken) {
		t.Errorf("delete: %v", err)
	}
	if got := m.Keys(); !slices.Equal(got, []string{"good"}) {
		t.Errorf("a delete that failed did something: %q", got)
	}
	if want := []string{"put bad", "put good", "delete good", "delete bad"}; !slices.Equal(asked, want) {
		t.Errorf("asked %q", asked)
	}
	m.Fail = nil
	m.FailAfter = func(string, string) error { return broken }
	if _, err := m.Put(t.Context(), "done", nil, objstore.PutOptions{IfNoneMatch: true}); !errors.Is(err, broken) {
		t.Errorf("put: %v", err)
	}
	m.FailAfter = nil
	if _, err := m.Stat(t.Context(), "done"); err != nil {
		t.Errorf("a put that failed afterwards did nothing: %v", err)
	}
	if _, err := m.GetRange(t.Context(), "good", 1, 3); err != nil {
		t.Error(err)
	}
	s := m.Stats()
	if s.Requests[objstore.OpPut] != 3 || s.Requests[objstore.OpDelete] != 1 || s.Total() != 6 || s.BytesIn != 5 || s.BytesOut != 3 {
		t.Errorf("counted %+v", s)
	}
	m.ResetStats()
	if s := m.Stats(); s.Total() != 0 || s.BytesIn != 0 {
		t.Errorf("after the reset %+v", s)
	}
	if err := m.Damage("good", func(d []byte) []byte { return append(bytes.ToUpper(d[:2]), 'x') }); err != nil {
		t.Fatal(err)
	}
	if data, o, err := m.Get(t.Context(), "good"); err != nil || string(data) != "12x" || o.Size != 3 {
		t.Errorf("damaged: %q, %+v, %v", data, o, err)
	}
}

func TestMemoryLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := objstore.NewMemory()
		m.Latency = 25 * time.Millisecond
		start := time.Now()
		o, err := m.Put(t.Context(), "k", nil, objstore.PutOptions{})
		if err != nil || time.Since(start) != m.Latency || !o.LastModified.Equal(time.Now()) {
			t.Errorf("put took %v: %+v, %v", time.Since(start), o, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if _, err := m.Stat(ctx, "k"); !errors.Is(err, objstore.ErrUnavailable) || time.Since(start) != 35*time.Millisecond {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
	})
}
