package storage

import (
	"strings"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// One damaged checkpoint stops the collection of a root. That is said, with its name,
// for as long as it does.
func TestUncollected(t *testing.T) {
	f := newFixture(t, t.TempDir(), oneProfile)
	a := session("a", "main", "root")
	id := f.save(a, map[string]string{"x": "1"})
	c := profile("main", "root")
	if err := f.Uncollected(c); err != nil {
		t.Errorf("not tried yet: %v", err)
	}
	key := "root/.cloudcode/v1/sessions/a/manifests/" + id
	mem := f.buckets.get("main")
	text, _, err := mem.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	for _, broken := range []bool{true, false} {
		now := text
		if broken {
			now = text[:len(text)/2]
		}
		if _, err := mem.Put(t.Context(), key, now, objstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		f.gc.collect(t.Context(), c)
		err := f.Uncollected(c)
		if !broken && err != nil || broken && (err == nil || !strings.Contains(err.Error(), id) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("broken %v: %v", broken, err)
		}
	}
}
