// Package objstoretest is the conformance suite of objstore.Store.
package objstoretest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// Run checks one implementation. Each test calls newStore for an empty store.
func Run(t *testing.T, newStore func(t *testing.T) objstore.Store) {
	for _, c := range []struct {
		name string
		fn   func(*testing.T, objstore.Store)
	}{
		{"put, get, stat and delete", testBasics},
		{"sizes", testSizes},
		{"what is not there", testNotFound},
		{"ranges", testRanges},
		{"create only", testIfNoneMatch},
		{"change only", testIfMatch},
		{"one of many creates", testConcurrentCreate},
		{"no change is lost", testConcurrentChange},
		{"list in order", testListOrder},
		{"list folded", testListFolded},
		{"list pages", testListPages},
		{"odd keys", testOddKeys},
		{"bad requests", testBad},
		{"delete many", testDeleteMany},
		{"end of the context", testContext},
		{"content is the caller's", testAliasing},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, newStore(t)) })
	}
	t.Run("below a prefix", func(t *testing.T) {
		base := newStore(t)
		put(t, base, "outside", "x")
		s := objstore.WithPrefix(objstore.WithPrefix(base, "a/"), "b/")
		put(t, s, "k/1", "one")
		put(t, s, "k/2", "two")
		if got := get(t, base, "a/b/k/1"); got != "one" {
			t.Errorf("a/b/k/1 is %q", got)
		}
		if got := keys(t, s, "", "", ""); !slices.Equal(got, []string{"k/1", "k/2"}) {
			t.Errorf("list: %q", got)
		}
		if got := keys(t, s, "k/", "/", "k/1"); !slices.Equal(got, []string{"k/2"}) {
			t.Errorf("list behind k/1: %q", got)
		}
		o, err := s.Stat(ctx(t), "k/1")
		if err != nil || o.Key != "k/1" {
			t.Errorf("stat: %+v, %v", o, err)
		}
		if err := s.Delete(ctx(t), "k/1", "k/2", "outside"); err != nil {
			t.Error(err)
		}
		if got := keys(t, base, "", "", ""); !slices.Equal(got, []string{"outside"}) {
			t.Errorf("left: %q", got)
		}
		if err := objstore.Close(s); err != nil {
			t.Error(err)
		}
	})
}

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return c
}

func put(t testing.TB, s objstore.Store, key, data string) objstore.Object {
	t.Helper()
	o, err := s.Put(ctx(t), key, []byte(data), objstore.PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func get(t testing.TB, s objstore.Store, key string) string {
	t.Helper()
	data, _, err := s.Get(ctx(t), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func keys(t testing.TB, s objstore.Store, prefix, delimiter, after string) []string {
	t.Helper()
	var list []string
	for o, err := range s.List(ctx(t), prefix, delimiter, after) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, o.Key)
	}
	return list
}

func wantErr(t testing.TB, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
	}
}

func testBasics(t *testing.T, s objstore.Store) {
	before := time.Now().Add(-time.Minute)
	first, err := s.Put(ctx(t), "dir/key", []byte("one"), objstore.PutOptions{ContentType: "text/html"})
	if err != nil {
		t.Fatal(err)
	}
	if first.ETag == "" || first.Size != 3 || first.Key != "dir/key" {
		t.Errorf("put returned %+v", first)
	}
	second := put(t, s, "dir/key", "zwei")
	if second.ETag == first.ETag {
		t.Errorf("changed content has the same ETag %s", second.ETag)
	}
	data, got, err := s.Get(ctx(t), "dir/key")
	if err != nil || string(data) != "zwei" {
		t.Fatalf("get: %q, %v", data, err)
	}
	stat, err := s.Stat(ctx(t), "dir/key")
	if err != nil {
		t.Fatal(err)
	}
	var listed objstore.Object
	for o, err := range s.List(ctx(t), "dir/", "", "") {
		if err != nil {
			t.Fatal(err)
		}
		listed = o
	}
	for what, o := range map[string]objstore.Object{"get": got, "stat": stat, "list": listed} {
		if o.Key != "dir/key" || o.Size != 4 || o.ETag != second.ETag || o.Prefix {
			t.Errorf("%s returned %+v, want ETag %s", what, o, second.ETag)
		}
		if o.LastModified.Before(before) || o.LastModified.After(time.Now().Add(time.Minute)) {
			t.Errorf("%s says it was changed at %v", what, o.LastModified)
		}
	}
	for range 2 {
		if err := s.Delete(ctx(t), "dir/key"); err != nil {
			t.Fatal(err)
		}
	}
	if got := keys(t, s, "", "", ""); len(got) > 0 {
		t.Errorf("left after delete: %q", got)
	}
}

func testSizes(t *testing.T, s objstore.Store) {
	for _, size := range []int{0, 1, 4096, 1<<20 + 7, 9 << 20} {
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i * 31 >> 3)
		}
		key := strconv.Itoa(size)
		put(t, s, key, string(want))
		if got := get(t, s, key); got != string(want) {
			t.Errorf("%d bytes came back as %d others", size, len(got))
		}
	}
}

func testNotFound(t *testing.T, s objstore.Store) {
	put(t, s, "a/b", "x")
	for _, key := range []string{"no", "a", "a/", "a/b/c", "a/bb"} {
		_, _, err := s.Get(ctx(t), key)
		wantErr(t, "get "+key, err, objstore.ErrNotFound)
		_, err = s.GetRange(ctx(t), key, 0, 1)
		wantErr(t, "range of "+key, err, objstore.ErrNotFound)
		_, err = s.Stat(ctx(t), key)
		wantErr(t, "stat "+key, err, objstore.ErrNotFound)
		if strings.HasSuffix(key, "/") {
			continue // where objects are files this is a folder that is not empty
		}
		if err := s.Delete(ctx(t), key); err != nil {
			t.Errorf("delete %s: %v", key, err)
		}
	}
	if got := get(t, s, "a/b"); got != "x" {
		t.Errorf("a/b is %q", got)
	}
	if err := s.Delete(ctx(t)); err != nil {
		t.Errorf("delete of nothing: %v", err)
	}
}

func testRanges(t *testing.T, s objstore.Store) {
	const content = "0123456789"
	put(t, s, "r", content)
	put(t, s, "empty", "")
	for _, r := range [][2]int64{{0, 10}, {0, 1}, {3, 4}, {9, 1}, {0, 0}, {10, 0}} {
		got, err := s.GetRange(ctx(t), "r", r[0], r[1])
		if err != nil || string(got) != content[r[0]:r[0]+r[1]] {
			t.Errorf("%d bytes at %d: %q, %v", r[1], r[0], got, err)
		}
	}
	for _, r := range [][2]int64{{0, 11}, {9, 2}, {10, 1}, {11, 0}, {100, 5}} {
		_, err := s.GetRange(ctx(t), "r", r[0], r[1])
		wantErr(t, fmt.Sprintf("%d bytes at %d", r[1], r[0]), err, io.ErrUnexpectedEOF)
	}
	_, err := s.GetRange(ctx(t), "empty", 0, 1)
	wantErr(t, "range of an empty object", err, io.ErrUnexpectedEOF)
	for _, r := range [][2]int64{{-1, 2}, {0, -1}} {
		if _, err := s.GetRange(ctx(t), "r", r[0], r[1]); err == nil {
			t.Errorf("%d bytes at %d: no error", r[1], r[0])
		}
	}
}

func testIfNoneMatch(t *testing.T, s objstore.Store) {
	create := objstore.PutOptions{IfNoneMatch: true}
	o, err := s.Put(ctx(t), "k", []byte("one"), create)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Put(ctx(t), "k", []byte("two"), create)
	wantErr(t, "second create", err, objstore.ErrPrecondition)
	// The same content is no excuse.
	_, err = s.Put(ctx(t), "k", []byte("one"), create)
	wantErr(t, "create of the same", err, objstore.ErrPrecondition)
	if st, err := s.Stat(ctx(t), "k"); err != nil || st.ETag != o.ETag {
		t.Errorf("it became %+v, %v", st, err)
	}
	if err := s.Delete(ctx(t), "k"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(ctx(t), "k", []byte("two"), create); err != nil {
		t.Errorf("create after delete: %v", err)
	}
	put(t, s, "k", "three")
}

func testIfMatch(t *testing.T, s objstore.Store) {
	_, err := s.Put(ctx(t), "k", []byte("x"), objstore.PutOptions{IfMatch: "d41d8cd98f00b204e9800998ecf8427e"})
	wantErr(t, "change of nothing", err, objstore.ErrPrecondition)
	if _, err := s.Stat(ctx(t), "k"); !errors.Is(err, objstore.ErrNotFound) {
		t.Fatalf("a refused put left something: %v", err)
	}
	first := put(t, s, "k", "one")
	second, err := s.Put(ctx(t), "k", []byte("two"), objstore.PutOptions{IfMatch: first.ETag})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Put(ctx(t), "k", []byte("three"), objstore.PutOptions{IfMatch: first.ETag})
	wantErr(t, "change of what has changed", err, objstore.ErrPrecondition)
	if got := get(t, s, "k"); got != "two" {
		t.Errorf("it became %q", got)
	}
	if err := s.Delete(ctx(t), "k"); err != nil {
		t.Fatal(err)
	}
	_, err = s.Put(ctx(t), "k", []byte("four"), objstore.PutOptions{IfMatch: second.ETag})
	wantErr(t, "change of what is gone", err, objstore.ErrPrecondition)
}

func testConcurrentCreate(t *testing.T, s objstore.Store) {
	c := ctx(t)
	const writers, rounds = 12, 10
	for round := range rounds {
		key := fmt.Sprintf("race/%d", round)
		won := make([]bool, writers)
		var g errgroup.Group
		for i := range writers {
			g.Go(func() error {
				err := tryAgain(func() error {
					_, err := s.Put(c, key, []byte(strconv.Itoa(i)), objstore.PutOptions{IfNoneMatch: true})
					return err
				})
				won[i] = err == nil
				if errors.Is(err, objstore.ErrPrecondition) {
					err = nil
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		winner := -1
		for i, w := range won {
			if w && winner >= 0 {
				t.Fatalf("%s was created by %d and by %d", key, winner, i)
			}
			if w {
				winner = i
			}
		}
		if got := get(t, s, key); got != strconv.Itoa(winner) {
			t.Fatalf("%s was created by %d and is %q", key, winner, got)
		}
	}
}

func testConcurrentChange(t *testing.T, s objstore.Store) {
	c := ctx(t)
	put(t, s, "counter", "0")
	const writers, changes = 6, 8
	var g errgroup.Group
	for range writers {
		g.Go(func() error {
			for done := 0; done < changes; {
				data, o, err := s.Get(c, "counter")
				if err != nil {
					return err
				}
				n, err := strconv.Atoi(string(data))
				if err != nil {
					return err
				}
				_, err = s.Put(c, "counter", []byte(strconv.Itoa(n+1)), objstore.PutOptions{IfMatch: o.ETag})
				switch {
				case err == nil:
					done++
				case errors.Is(err, objstore.ErrPrecondition), errors.Is(err, objstore.ErrUnavailable):
					// Unavailable: the store gave up on so many at once, and nothing was written
					// or the count shows it.
				default:
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if got, want := get(t, s, "counter"), strconv.Itoa(writers*changes); got != want {
		t.Errorf("after %s changes it is %s", want, got)
	}
}

// tryAgain repeats what the store is too busy for.
func tryAgain(fn func() error) error {
	var err error
	for range 10 {
		if err = fn(); !errors.Is(err, objstore.ErrUnavailable) {
			return err
		}
	}
	return err
}

// ordered are keys by their bytes, chosen so that walking folders gives another order.
var ordered = []string{"A", "a", "a-b", "a.txt", "a/1", "a/10", "a/2", "a/b/c", "a0", "ab/x", "b", "ä"}

func testListOrder(t *testing.T, s objstore.Store) {
	files := slices.DeleteFunc(slices.Clone(ordered), func(k string) bool { return k == "a" }) // a folder, where objects are files
	for _, k := range slices.Backward(files) {
		put(t, s, k, k)
	}
	if got := keys(t, s, "", "", ""); !slices.Equal(got, files) {
		t.Errorf("all:\n got %q\nwant %q", got, files)
	}
	if got, want := keys(t, s, "a", "", ""), []string{"a-b", "a.txt", "a/1", "a/10", "a/2", "a/b/c", "a0", "ab/x"}; !slices.Equal(got, want) {
		t.Errorf("a…:\n got %q\nwant %q", got, want)
	}
	if got, want := keys(t, s, "a/", "", ""), []string{"a/1", "a/10", "a/2", "a/b/c"}; !slices.Equal(got, want) {
		t.Errorf("a/…:\n got %q\nwant %q", got, want)
	}
	if got, want := keys(t, s, "a/", "", "a/10"), []string{"a/2", "a/b/c"}; !slices.Equal(got, want) {
		t.Errorf("a/… behind a/10:\n got %q\nwant %q", got, want)
	}
	if got, want := keys(t, s, "", "", "a/zz"), []string{"a0", "ab/x", "b", "ä"}; !slices.Equal(got, want) {
		t.Errorf("behind a/zz, which is not there:\n got %q\nwant %q", got, want)
	}
	if got := keys(t, s, "nothing/", "", ""); len(got) > 0 {
		t.Errorf("nothing: %q", got)
	}
	n := 0
	for _, err := range s.List(ctx(t), "", "", "") {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n == 3 {
			break
		}
	}
	if n != 3 {
		t.Errorf("a list that one stops reading yielded %d", n)
	}
}

func testListFolded(t *testing.T, s objstore.Store) {
	for _, k := range []string{"s/a-b/x", "s/a/head", "s/a/m/1", "s/a/m/2", "s/a.txt", "s/b", "s/c!d/head", "t/x"} {
		put(t, s, k, k)
	}
	type entry struct {
		key    string
		prefix bool
	}
	for _, c := range []struct {
		prefix, after string
		want          []entry
	}{
		{"s/", "", []entry{{"s/a-b/", true}, {"s/a.txt", false}, {"s/a/", true}, {"s/b", false}, {"s/c!d/", true}}},
		{"s/a", "", []entry{{"s/a-b/", true}, {"s/a.txt", false}, {"s/a/", true}}},
		{"s/a/", "", []entry{{"s/a/head", false}, {"s/a/m/", true}}},
		{"s/", "s/a.txt", []entry{{"s/a/", true}, {"s/b", false}, {"s/c!d/", true}}},
		{"s/", "s/a/", []entry{{"s/b", false}, {"s/c!d/", true}}},
		{"", "", []entry{{"s/", true}, {"t/", true}}},
		{"x/", "", nil},
	} {
		var got []entry
		for o, err := range s.List(ctx(t), c.prefix, "/", c.after) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, entry{o.Key, o.Prefix})
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%q behind %q:\n got %v\nwant %v", c.prefix, c.after, got, c.want)
		}
	}
}

// many puts n objects, some at a time.
func many(t testing.TB, s objstore.Store, n int) []string {
	t.Helper()
	c := ctx(t)
	list := make([]string, n)
	var g errgroup.Group
	g.SetLimit(8)
	for i := range n {
		list[i] = fmt.Sprintf("many/%02x/%05d", i*7%16, i)
		g.Go(func() error {
			_, err := s.Put(c, list[i], nil, objstore.PutOptions{})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	slices.Sort(list)
	return list
}

func testListPages(t *testing.T, s objstore.Store) {
	want := many(t, s, 1100) // a page has 1000
	if got := keys(t, s, "many/", "", ""); !slices.Equal(got, want) {
		t.Errorf("%d of %d, or in another order", len(got), len(want))
	}
	if got := keys(t, s, "many/", "", want[1050]); !slices.Equal(got, want[1051:]) {
		t.Errorf("behind the 1050th: %d of %d", len(got), len(want)-1051)
	}
	if got := keys(t, s, "many/", "/", ""); len(got) != 16 || got[3] != "many/03/" {
		t.Errorf("folded: %q", got)
	}
}

func testOddKeys(t *testing.T, s objstore.Store) {
	odd := []string{
		"space in it", "plus+plus", "per%20cent", "q?x=1&y=2", "hash#tag", "quote\"'`", "semi;colon:at@",
		"brackets[]{}()<>", "exclam!$*,=~|^", "uml äöü/日本/😀", ".hidden", "a..b/c...d", "_root", "-dash",
	}
	for _, k := range odd {
		put(t, s, k, "content of "+k)
	}
	for _, k := range odd {
		if got := get(t, s, k); got != "content of "+k {
			t.Errorf("%q is %q", k, got)
		}
		if o, err := s.Stat(ctx(t), k); err != nil || o.Key != k {
			t.Errorf("stat %q: %+v, %v", k, o, err)
		}
	}
	want := slices.Sorted(slices.Values(odd))
	if got := keys(t, s, "", "", ""); !slices.Equal(got, want) {
		t.Errorf("list:\n got %q\nwant %q", got, want)
	}
	if err := s.Delete(ctx(t), odd...); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, s, "", "", ""); len(got) > 0 {
		t.Errorf("left after delete: %q", got)
	}
}

func testBad(t *testing.T, s objstore.Store) {
	o := put(t, s, "k", "x")
	_, err := s.Put(ctx(t), "k", []byte("y"), objstore.PutOptions{IfMatch: o.ETag, IfNoneMatch: true})
	wantErr(t, "two conditions", err, objstore.ErrUnsupported)
	for _, err := range s.List(ctx(t), "", "-", "") {
		wantErr(t, "another delimiter", err, objstore.ErrUnsupported)
	}
	for _, k := range []string{"", string(bytes.Repeat([]byte("k"), 1025))} {
		_, err := s.Put(ctx(t), k, nil, objstore.PutOptions{})
		wantErr(t, fmt.Sprintf("put of a key of %d bytes", len(k)), err, objstore.ErrUnsupported)
	}
}

func testDeleteMany(t *testing.T, s objstore.Store) {
	list := many(t, s, 1050) // one request has 1000
	put(t, s, "many-not", "stays")
	if err := s.Delete(ctx(t), append(list, "many/not/there")...); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, s, "", "", ""); !slices.Equal(got, []string{"many-not"}) {
		t.Errorf("left: %d keys", len(got))
	}
}

func testContext(t *testing.T, s objstore.Store) {
	put(t, s, "k", "x")
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	for _, c := range []struct {
		ctx  context.Context
		want error
	}{{canceled, context.Canceled}, {late, context.DeadlineExceeded}} {
		ops := map[string]func() error{
			"get":    func() error { _, _, err := s.Get(c.ctx, "k"); return err },
			"range":  func() error { _, err := s.GetRange(c.ctx, "k", 0, 1); return err },
			"stat":   func() error { _, err := s.Stat(c.ctx, "k"); return err },
			"put":    func() error { _, err := s.Put(c.ctx, "k", []byte("y"), objstore.PutOptions{}); return err },
			"delete": func() error { return s.Delete(c.ctx, "k") },
			"list": func() error {
				for _, err := range s.List(c.ctx, "", "", "") {
					return err
				}
				return nil
			},
		}
		for name, op := range ops {
			err := op()
			wantErr(t, name, err, c.want)
			// A store that did not answer in the caller's time is one to ask again; a
			// caller that gave up says nothing about the store.
			if got := errors.Is(err, objstore.ErrUnavailable); got != (c.want == context.DeadlineExceeded) { //nolint:errorlint // from the table above
				t.Errorf("%s: unavailable: %v: %v", name, got, err)
			}
		}
	}
	if got := get(t, s, "k"); got != "x" {
		t.Errorf("k is %q", got)
	}
}

func testAliasing(t *testing.T, s objstore.Store) {
	data := []byte("mine")
	if _, err := s.Put(ctx(t), "k", data, objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	data[0] = 'X'
	got, _, err := s.Get(ctx(t), "k")
	if err != nil {
		t.Fatal(err)
	}
	got[1] = 'X'
	if got := get(t, s, "k"); got != "mine" {
		t.Errorf("it became %q", got)
	}
}
