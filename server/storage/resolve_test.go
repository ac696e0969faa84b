package storage

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

func ptr(s string) *string { return &s }

func TestResolve(t *testing.T) {
	tigris := profile("ttt", "", func(c *conf.Config) { c.Endpoint = "https://fly.storage.tigris.dev" })
	f := newFixture(t, t.TempDir(), map[string]conf.Config{
		"default": profile("main", "root"), "tigris": tigris, "fixed": profile("main", "", func(c *conf.Config) { c.Region = "eu-1" }),
	})
	for _, key := range []string{"root/old/workspace/project/x", "root/oc/.opencode/config.json", "root/other/file", "root/nest/.cloudcode/v1/sessions/x/head"} {
		if _, err := f.buckets.get("main").Put(t.Context(), key, []byte("x"), objstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	saved := session("saved", "main", "root")
	saved.Generation = 7
	f.save(saved, map[string]string{"workspace/project/a": "1"})
	mounted := session("mounted", "main", "root")
	mounted.Spec.Storage.Mode = fleet.ModeMount
	f.save(mounted, map[string]string{".opencode/data/x": "1"})

	own := &fleet.S3{Endpoint: "https://minio.example.com/", Bucket: "own", AccessKeyID: "k", SecretAccessKey: "hunter2", Prefix: "/p/"}
	in := func(mode fleet.StorageMode, profile, prefix string) fleet.Storage {
		return fleet.Storage{Mode: mode, Profile: profile, Prefix: prefix, Endpoint: "https://s3.example.com", Bucket: "main", Root: "root", Region: "found-1"}
	}
	for name, c := range map[string]struct {
		request    protoconv.StorageRequest
		want       fleet.Storage
		generation uint64
		code       codes.Code
		reason     string
		says       []string
	}{
		"nothing asked":     {want: in(fleet.ModeSnapshot, "default", "id")},
		"local":             {request: protoconv.StorageRequest{Mode: fleet.ModeLocal}, want: fleet.Storage{Mode: fleet.ModeLocal}},
		"auto":              {request: protoconv.StorageRequest{Mode: fleet.ModeAuto, Profile: "default"}, want: in(fleet.ModeSnapshot, "default", "id")},
		"mount":             {request: protoconv.StorageRequest{Mode: fleet.ModeMount}, want: in(fleet.ModeMount, "default", "id")},
		"prefix":            {request: protoconv.StorageRequest{Prefix: ptr("a/b")}, want: in(fleet.ModeSnapshot, "default", "a/b")},
		"of the original":   {request: protoconv.StorageRequest{Prefix: ptr("old")}, want: in(fleet.ModeMount, "default", "old")},
		"of the original 2": {request: protoconv.StorageRequest{Prefix: ptr("oc")}, want: in(fleet.ModeMount, "default", "oc")},
		"its own wish":      {request: protoconv.StorageRequest{Mode: fleet.ModeSnapshot, Prefix: ptr("old")}, want: in(fleet.ModeSnapshot, "default", "old")},
		"other files":       {request: protoconv.StorageRequest{Prefix: ptr("other")}, want: in(fleet.ModeSnapshot, "default", "other")},
		"checkpoints":       {request: protoconv.StorageRequest{Prefix: ptr("saved")}, want: in(fleet.ModeSnapshot, "default", "saved"), generation: 7},
		"of a mount":        {request: protoconv.StorageRequest{Prefix: ptr("mounted")}, want: in(fleet.ModeMount, "default", "mounted"), generation: 1},
		"the whole root":    {request: protoconv.StorageRequest{Prefix: ptr("")}, want: in(fleet.ModeSnapshot, "default", "")},
		"other mode": {
			request: protoconv.StorageRequest{Mode: fleet.ModeMount, Prefix: ptr("saved")},
			code:    codes.FailedPrecondition, reason: ReasonOtherMode, says: []string{"SNAPSHOT", "s3://main/root/saved"},
		},
		"a root of others": {
			request: protoconv.StorageRequest{Prefix: ptr("nest")}, code: codes.FailedPrecondition, reason: ReasonPrefixInUse, says: []string{"s3://main/root/nest"},
		},
		"no such profile": {
			request: protoconv.StorageRequest{Profile: "nosuch"}, code: codes.NotFound, reason: ReasonNoProfile, says: []string{"default", "fixed", "tigris"},
		},
		"own": {
			request: protoconv.StorageRequest{S3: own},
			want: fleet.Storage{
				Mode: fleet.ModeSnapshot, Prefix: "id", Endpoint: "https://minio.example.com", Bucket: "own", Root: "p", Region: "found-1",
				S3: &fleet.S3{Endpoint: "https://minio.example.com", Bucket: "own", AccessKeyID: "k", SecretAccessKey: "hunter2", Prefix: "p"},
			},
		},
		"own, incomplete": {
			request: protoconv.StorageRequest{S3: &fleet.S3{Endpoint: "https://x.example.com", AccessKeyID: "k"}},
			code:    codes.InvalidArgument, reason: ReasonIncomplete, says: []string{"bucket", "secret_access_key"},
		},
		"tigris": {
			request: protoconv.StorageRequest{Profile: "tigris"},
			want:    fleet.Storage{Mode: fleet.ModeMount, Profile: "tigris", Prefix: "id", Endpoint: tigris.Endpoint, Bucket: "ttt", Region: "found-1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := f.Resolve(t.Context(), "id", c.request)
			if c.reason != "" {
				wantErr(t, name, err, c.code, c.reason, c.says...)
				return
			}
			if err != nil || !got.Storage.Equal(c.want) || got.Generation != c.generation {
				t.Errorf("got %+v, %v, want %+v", got, err, c.want)
			}
		})
	}
}

func TestResolveWithoutDefault(t *testing.T) {
	for name, profiles := range map[string]map[string]conf.Config{"none": nil, "others": {"team": profile("team", "")}} {
		f := newFixture(t, t.TempDir(), profiles)
		for _, mode := range []fleet.StorageMode{"", fleet.ModeAuto, fleet.ModeLocal} {
			got, err := f.Resolve(t.Context(), "id", protoconv.StorageRequest{Mode: mode})
			if err != nil || !got.Storage.Equal(fleet.Storage{Mode: fleet.ModeLocal}) {
				t.Errorf("%s, %s: %+v, %v", name, mode, got, err)
			}
		}
		for _, r := range []protoconv.StorageRequest{{Mode: fleet.ModeMount}, {Mode: fleet.ModeSnapshot}, {Prefix: ptr("x")}} {
			_, err := f.Resolve(t.Context(), "id", r)
			wantErr(t, name, err, codes.FailedPrecondition, ReasonNotConfigured, "S3_ENDPOINT")
		}
		if f.buckets.checks != 0 {
			t.Error("an object store was asked")
		}
	}
}

func TestChecksAreShared(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, dir, map[string]conf.Config{"default": profile("main", "")})
		f.buckets.wait = make(chan struct{})
		resolve := func() error {
			_, err := f.Resolve(t.Context(), "id", protoconv.StorageRequest{})
			return err
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if err := resolve(); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		close(f.buckets.wait)
		wg.Wait()
		if f.buckets.checks != 1 {
			t.Errorf("%d checks at once", f.buckets.checks)
		}
		time.Sleep(checkFor - time.Second)
		_ = resolve()
		time.Sleep(2 * time.Second)
		_ = resolve()
		if f.buckets.checks != 2 {
			t.Errorf("%d checks after a minute", f.buckets.checks)
		}

		// What failed is asked for again at once, and what does not answer is bounded.
		time.Sleep(checkFor)
		f.buckets.fail = fmt.Errorf("%w: no", objstore.ErrDenied)
		for range 2 {
			wantErr(t, "wrong keys", resolve(), codes.FailedPrecondition, ReasonDenied, "s3://main", "s3.example.com")
		}
		if f.buckets.checks != 4 {
			t.Errorf("%d checks after failures", f.buckets.checks)
		}
		f.buckets.fail, f.buckets.wait = nil, make(chan struct{})
		start := time.Now()
		wantErr(t, "no answer", resolve(), codes.Unavailable, ReasonUnreachable, "10s")
		if took := time.Since(start); took != checkBound {
			t.Errorf("took %v", took)
		}
	})
}

func TestWords(t *testing.T) {
	f := newFixture(t, t.TempDir(), map[string]conf.Config{"default": profile("main", "")})
	own := &fleet.S3{Endpoint: "https://minio.example.com", Bucket: "own", AccessKeyID: "k", SecretAccessKey: "hunter2"}
	for class, reason := range map[error]string{
		objstore.ErrDenied: ReasonDenied, objstore.ErrNoBucket: ReasonNoBucket, objstore.ErrRegion: ReasonWrongRegion, objstore.ErrUnsupported: ReasonUnsupported,
	} {
		f.buckets.fail = fmt.Errorf("put x: %w: the server's words", class)
		_, err := f.Resolve(t.Context(), "id", protoconv.StorageRequest{})
		wantErr(t, "profile", err, codes.FailedPrecondition, reason, "s3://main", "the server's words")
		_, err = f.Resolve(t.Context(), "id", protoconv.StorageRequest{S3: own})
		wantErr(t, "own", err, codes.InvalidArgument, reason, "session.spec.storage.s3", "s3://own", "the server's words")
	}
	f.buckets.fail = fmt.Errorf("%w: refused", objstore.ErrUnavailable)
	for _, r := range []protoconv.StorageRequest{{}, {S3: own}} {
		_, err := f.Resolve(t.Context(), "id", r)
		wantErr(t, "away", err, codes.Unavailable, ReasonUnreachable)
	}
	f.buckets.fail = errors.New("a bug")
	if _, err := f.Resolve(t.Context(), "id", protoconv.StorageRequest{}); !errors.Is(err, f.buckets.fail) {
		t.Errorf("what is not known: %v", err)
	}
}

func TestInUse(t *testing.T) {
	f := newFixture(t, t.TempDir(), nil)
	at := func(endpoint, bucket, root, prefix string) fleet.Storage {
		return fleet.Storage{Mode: fleet.ModeSnapshot, Endpoint: endpoint, Bucket: bucket, Root: root, Prefix: prefix}
	}
	const e = "https://s3.example.com"
	one, local := session("one", "b", ""), session("local", "", "")
	one.Spec.Storage = at(e, "b", "r", "team/one")
	local.Spec.Storage = fleet.Storage{Mode: fleet.ModeLocal}
	f.put(one, local)
	for name, c := range map[string]struct {
		st   fleet.Storage
		free bool
	}{
		"the same":           {at(e, "b", "r", "team/one"), false},
		"by another address": {at("https://S3.example.com:443", "b", "r", "team/one"), false},
		"by another root":    {at(e, "b", "r/team", "one"), false},
		"inside":             {at(e, "b", "r", "team/one/x"), false},
		"around":             {at(e, "b", "r", "team"), false},
		"the whole bucket":   {at(e, "b", "", ""), false},
		"beside":             {at(e, "b", "r", "team/one2"), true},
		"another root":       {at(e, "b", "q", "team/one"), true},
		"another bucket":     {at(e, "c", "r", "team/one"), true},
		"another server":     {at("https://minio.example.com", "b", "r", "team/one"), true},
		"local":              {fleet.Storage{Mode: fleet.ModeLocal}, true},
	} {
		err := f.store.View(t.Context(), func(tx store.ReadTx) error { return InUse(tx, c.st) })
		if c.free {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		wantErr(t, name, err, codes.FailedPrecondition, ReasonPrefixInUse, `"one"`)
	}
	one.Deleting = true
	f.put(one)
	err := f.store.View(t.Context(), func(tx store.ReadTx) error { return InUse(tx, one.Spec.Storage) })
	wantErr(t, "deleted", err, codes.FailedPrecondition, ReasonPrefixInUse, "still being deleted")
}

// Buckets of sessions' own lead where their users want: not to what only server and
// nodes can reach, unless that is meant.
func TestOwnPolicy(t *testing.T) {
	ctx := t.Context()
	own := &fleet.S3{Endpoint: "https://s3.example.com", Bucket: "main", AccessKeyID: "k", SecretAccessKey: "hunter2"}
	tigris := &fleet.S3{Endpoint: "https://fly.storage.tigris.dev", Bucket: "ttt", AccessKeyID: "k", SecretAccessKey: "hunter2"}
	for policy, c := range map[conf.OwnPolicy]struct{ public, refused bool }{
		"": {public: true}, conf.OwnPublic: {public: true}, conf.OwnAny: {}, conf.OwnDeny: {public: true, refused: true},
	} {
		f := newFixture(t, t.TempDir(), map[string]conf.Config{"default": profile("main", "")})
		var opened []conf.Config
		open := f.config.Open
		f.Storage = New(Config{Store: f.store, Profiles: f.config.Profiles, Own: policy, Check: f.config.Check, Open: func(c conf.Config) (objstore.Store, error) {
			opened = append(opened, c)
			return open(c)
		}})
		if err := errors.Join(put(ctx, f.buckets.get("main"), "old/workspace/x"), put(ctx, f.buckets.get("main"), "other")); err != nil {
			t.Fatal(err)
		}
		resolve := func(r protoconv.StorageRequest) (fleet.Storage, error) {
			got, err := f.Resolve(ctx, "id", r)
			return got.Storage, err
		}
		if _, err := resolve(protoconv.StorageRequest{Mode: fleet.ModeMount}); err != nil || len(opened) != 1 || opened[0].PublicOnly || opened[0].Own {
			t.Errorf("%q: the operator's is restricted: %+v, %v", policy, opened, err)
		}
		st, err := resolve(protoconv.StorageRequest{S3: own})
		if c.refused {
			wantErr(t, string(policy), err, codes.InvalidArgument, ReasonNotAllowed, "--own-storage")
		} else if err != nil || len(opened) != 2 || !opened[1].Own || opened[1].PublicOnly != c.public {
			t.Errorf("%q: %+v, %v", policy, opened, err)
		}
		// Those that are there go on.
		st = fleet.Storage{Mode: fleet.ModeSnapshot, Prefix: "id", Endpoint: own.Endpoint, Bucket: own.Bucket, S3: own}
		if a := f.Assigned(st); !a.GetOwn() || a.GetPublicOnly() != c.public || a.GetSecretAccessKey() == "" {
			t.Errorf("%q: assigned %v", policy, a)
		}
		st.S3, st.Profile = nil, "default"
		if a := f.Assigned(st); a.GetOwn() || a.GetPublicOnly() {
			t.Errorf("%q: of the operator, assigned %v", policy, a)
		}
		if c.refused {
			continue
		}
		// A mounter cannot be watched: what is restricted is not mounted.
		for name, r := range map[string]protoconv.StorageRequest{
			"asked for":       {S3: own, Mode: fleet.ModeMount},
			"of the original": {S3: own, Prefix: ptr("old")},
		} {
			st, err := resolve(r)
			if c.public {
				wantErr(t, name, err, codes.InvalidArgument, ReasonNotAllowed, "session.spec.storage.s3", "SNAPSHOT", "--own-storage=any")
			} else if err != nil || st.Mode != fleet.ModeMount {
				t.Errorf("%s: %+v, %v", name, st, err)
			}
		}
		want := fleet.ModeMount
		if c.public {
			want = fleet.ModeSnapshot
		}
		if st, err := resolve(protoconv.StorageRequest{S3: tigris}); err != nil || st.Mode != want {
			t.Errorf("%q: on Tigris: %+v, %v", policy, st, err)
		}
	}
}

func put(ctx context.Context, s objstore.Store, key string) error {
	_, err := s.Put(ctx, key, nil, objstore.PutOptions{})
	return err
}

func TestAssigned(t *testing.T) {
	f := newFixture(t, t.TempDir(), map[string]conf.Config{
		"default": profile("main", "root", func(c *conf.Config) {
			c.EncryptionKey, c.TigrisFSArgs, c.PathStyle = make([]byte, 32), "--x", true
		}),
		"fixed": profile("main", "", func(c *conf.Config) { c.Region = "eu-1" }),
	})
	st := session("a", "main", "root").Spec.Storage
	st.Region = "found-1"
	got := f.Assigned(st)
	if got.GetEndpoint() != "https://s3.example.com" || got.GetBucket() != "main" || got.GetAccessKeyId() != "k" || got.GetSecretAccessKey() != "hunter2" ||
		got.GetRegion() != "found-1" || !got.GetPathStyle() || got.GetRoot() != "root" || got.GetPrefix() != "a" || got.GetTigrisfsArgs() != "--x" ||
		len(got.GetEncryptionKey()) != 32 || got.GetMode().String() != "SNAPSHOT" {
		t.Errorf("assigned %v", got)
	}
	st.Region = ""
	if got := f.Assigned(st).GetRegion(); got != "auto" {
		t.Errorf("region %q", got)
	}
	st.Profile, st.Root = "fixed", ""
	if got := f.Assigned(st).GetRegion(); got != "eu-1" {
		t.Errorf("region %q", got)
	}
	// Without keys a node must not take it for a local one.
	for what, change := range map[string]func(*fleet.Storage){
		"profile gone": func(s *fleet.Storage) { s.Profile = "nosuch" },
		"other bucket": func(s *fleet.Storage) { s.Bucket = "before" },
	} {
		lost := st
		change(&lost)
		got := f.Assigned(lost)
		if got == nil || got.GetSecretAccessKey() != "" || got.GetEndpoint() != "" || got.GetPrefix() != "a" {
			t.Errorf("%s: %v", what, got)
		}
		_, err := f.Session(lost)
		wantErr(t, what, err, codes.FailedPrecondition, ReasonNotConfigured)
	}
	_, err := f.Session(fleet.Storage{Mode: fleet.ModeLocal})
	wantErr(t, "local", err, codes.FailedPrecondition, ReasonLocal)
}

// Sessions may each bring a bucket; what is open is bounded.
func TestManyBuckets(t *testing.T) {
	f := newFixture(t, t.TempDir(), nil)
	for i := range maxOpen + 20 {
		own := &fleet.S3{Endpoint: "https://minio.example.com", Bucket: fmt.Sprintf("own%d", i), AccessKeyID: "k", SecretAccessKey: "hunter2"}
		if _, err := f.Resolve(t.Context(), "id", protoconv.StorageRequest{S3: own}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(f.open); n != maxOpen {
		t.Errorf("%d are open", n)
	}
}

// A folder whose session runs in another fleet, or is half there, is not given to a
// new one; what was let go of is.
func TestResolveTaken(t *testing.T) {
	f := newFixture(t, t.TempDir(), oneProfile)
	f.save(session("source", "main", "root"), map[string]string{"x": "1"})
	live, suspended, forked, purged, ours := session("live", "main", "root"), session("suspended", "main", "root"), session("forked", "main", "root"), session("purged", "main", "root"), session("ours", "main", "root")
	live.Generation, suspended.Generation, purged.Generation = 7, 3, 4
	f.take(live, "n9")
	f.take(ours, "n1")
	f.put(ours)
	f.save(suspended, map[string]string{"x": "1"})
	from, err := f.Session(session("source", "main", "root").Spec.Storage)
	if err != nil {
		t.Fatal(err)
	}
	id, err := from.inner.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	to := from.Sibling("forked")
	if err := to.Copy(t.Context(), from, id, forked); err != nil {
		t.Fatal(err)
	}
	f.take(purged, "n1")
	if err := f.purge(t.Context(), deleted(purged, true)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		generation uint64
		says       string // empty: it is given
	}{
		"live": {says: "session recover live"}, "ours": {says: `session "ours" has that folder`}, "forked": {says: "session recover forked"},
		"suspended": {generation: 3}, "purged": {generation: 5}, "new": {},
	} {
		got, err := f.Resolve(t.Context(), name, protoconv.StorageRequest{})
		if c.says != "" {
			wantErr(t, name, err, codes.FailedPrecondition, ReasonPrefixInUse, c.says)
		} else if err != nil || got.Generation != c.generation {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}

	// A fork of that id counts on where the purged one has ended, and is taken back alone.
	again := session("purged", "main", "root")
	again.UID, again.Generation = "u-fork", 0
	to = from.Sibling("purged")
	if err := to.Copy(t.Context(), from, id, again); err != nil || again.Generation != 5 {
		t.Fatalf("generation %d, %v", again.Generation, err)
	}
	other := again.Clone()
	other.UID = "u-other"
	if err := to.Discard(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if h, err := f.head(again); err != nil || h.Owner != owner(again) || h.Manifest == "" {
		t.Errorf("taken back for another: %+v, %v", h, err)
	}
	if err := to.Discard(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	if h, err := f.head(again); err != nil || !h.Purged() {
		t.Errorf("taken back: %+v, %v", h, err)
	}
}
