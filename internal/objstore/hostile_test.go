package objstore_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// raw answers each request with a text as it is, and then with more of it for as
// long as it is read.
func raw(t testing.TB, head, more string) objstore.Store {
	return openStore(t, fake(t, func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 200 OK\r\nETag: \"x\"\r\nLast-Modified: Tue, 24 Nov 2026 22:39:21 GMT\r\nConnection: close\r\n"+head)
		if more == "" {
			return
		}
		for text := strings.Repeat(more, 1<<16/len(more)+1); ; {
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
	}))
}

// grown is how much memory was taken while f ran.
func grown(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// A server that means harm takes neither the process nor its memory.
func TestHostileContent(t *testing.T) {
	for name, c := range map[string]struct {
		head, more string
		class      error
	}{
		"more than memory":       {"Content-Length: 9000000000000000000\r\n\r\nabc", "", objstore.ErrTooLarge},
		"more than an int":       {"Content-Length: 99999999999999999999\r\n\r\nabc", "", objstore.ErrUnavailable},
		"negative":               {"Content-Length: -5\r\n\r\nabc", "", objstore.ErrUnavailable},
		"a little too much":      {fmt.Sprintf("Content-Length: %d\r\n\r\n", objstore.MaxObject+1), "x", objstore.ErrTooLarge},
		"no length, and no end":  {"\r\n", strings.Repeat("x", 1<<16), objstore.ErrTooLarge},
		"said and not delivered": {fmt.Sprintf("Content-Length: %d\r\n\r\nabc", objstore.MaxObject), "", objstore.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			s := raw(t, c.head, c.more)
			if _, _, err := s.Get(t.Context(), "k"); !errors.Is(err, c.class) {
				t.Errorf("Get: %v", err)
			}
			if c.class != objstore.ErrTooLarge {
				return
			}
			var err error
			if n := grown(func() { _, _, err = objstore.GetUpTo(t.Context(), objstore.WithPrefix(s, "p/"), "k", 1000) }); n > 16<<20 {
				t.Errorf("%d bytes were taken for an object of 1000", n)
			}
			wantErr(t, err, objstore.ErrTooLarge, "1000")
			if !errors.Is(err, objstore.ErrUnsupported) {
				t.Error(err)
			}
		})
	}
}

func TestHostileDocuments(t *testing.T) {
	const start = "\r\n<?xml version=\"1.0\"?><ListBucketResult><Name>bucket</Name>"
	for name, c := range map[string]struct{ head, more string }{
		"no end":     {start + "<Contents><Key>", "xxxxxxxx"},
		"empty tags": {start, "<Contents/>"},
		"spaces":     {start, " "},
	} {
		t.Run(name, func(t *testing.T) {
			var err error
			if n := grown(func() { err = list(t.Context(), raw(t, c.head, c.more)) }); n > 512<<20 {
				t.Errorf("a list took %d MiB", n>>20)
			}
			wantErr(t, err, objstore.ErrTooLarge)
		})
	}
	for name, fn := range map[string]func(s objstore.Store) error{
		"put": func(s objstore.Store) error {
			_, err := s.Put(t.Context(), "k", nil, objstore.PutOptions{})
			return err
		},
		"delete":      func(s objstore.Store) error { return s.Delete(t.Context(), "k") },
		"delete many": func(s objstore.Store) error { return s.Delete(t.Context(), "k", "l") },
	} {
		t.Run(name, func(t *testing.T) {
			// What a server says behind its answer may be of no interest, but it ends.
			err := fn(raw(t, "\r\n<?xml version=\"1.0\"?><DeleteResult>", "<Deleted/>"))
			t.Log(err)
			if name == "delete many" && !errors.Is(err, objstore.ErrUnsupported) {
				t.Error(err)
			}
		})
	}
	t.Run("error", func(t *testing.T) {
		s := openStore(t, fake(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, "<Error><Code>AccessDenied</Code><Message>")
			for text := bytes.Repeat([]byte("x"), 1<<16); ; {
				if _, err := w.Write(text); err != nil {
					return
				}
			}
		}))
		if _, _, err := s.Get(t.Context(), "k"); !errors.Is(err, objstore.ErrDenied) {
			t.Error(err)
		}
	})
}

// What can be written can be read, whoever stores it.
func TestLargestObject(t *testing.T) {
	s := objstore.NewMemory()
	text := make([]byte, objstore.MaxObject+1)
	if _, err := s.Put(t.Context(), "k", text, objstore.PutOptions{}); !errors.Is(err, objstore.ErrTooLarge) {
		t.Error(err)
	}
	if _, err := openStore(t, fake(t, nil)).Put(t.Context(), "k", text, objstore.PutOptions{}); !errors.Is(err, objstore.ErrTooLarge) {
		t.Error(err)
	}
	if _, err := s.Put(t.Context(), "k", text[1:], objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, _, err := s.Get(t.Context(), "k"); err != nil || len(got) != objstore.MaxObject {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, _, err := objstore.GetUpTo(t.Context(), s, "k", objstore.MaxObject-1); !errors.Is(err, objstore.ErrTooLarge) {
		t.Error(err)
	}
}
