package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// seed puts stand-ins for the slow layers into a cache, so that Build needs no tools and no root.
func seed(t *testing.T, dir string, keys ...string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c, err := openCache(t.Context(), dir, func() {})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	for _, key := range keys {
		var tr tree
		tr.bytes("seed/"+key, 0o644, []byte(key))
		l, err := writeLayer(filepath.Join(dir, "work-seed"), func(tw *tar.Writer) error { return tr.writeTo(tw) })
		if err != nil {
			t.Fatal(err)
		}
		l.Key, l.Name = key, "seed"
		if err := c.store(l); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBuildFromCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	seed(t, dir, baseKey(BuildOptions{}), toolsKey(), "of-an-older-version")
	var lines []Progress
	o := BuildOptions{CacheDir: dir, Progress: func(p Progress) { lines = append(lines, p) }}
	first, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if first.Ref != DefaultRef || first.Cached || len(first.Layers) != 3 || len(lines) < 4 {
		t.Errorf("first: %+v after %d lines", first, len(lines))
	}
	if len(first.LeftOut) != 1 || !strings.Contains(first.LeftOut[0], "--with-cloudflared") {
		t.Errorf("left out: %q", first.LeftOut)
	}
	if old, _ := filepath.Glob(filepath.Join(dir, "*of-an-older-version*")); len(old) > 0 {
		t.Errorf("not pruned: %q", old)
	}

	second, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !second.Cached || second.Digest != first.Digest || second.Path != first.Path || second.Size != first.Size {
		t.Errorf("second: %+v, first: %+v", second, first)
	}

	o.Ref = "example.test/mine:7"
	renamed, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if renamed.Digest != first.Digest || renamed.Path == first.Path || renamed.Cached {
		t.Errorf("renamed: %+v, first: %+v", renamed, first)
	}
	checkArchive(t, renamed)

	// A layer of the wrong size is not used: without root or tools the build must say so.
	p := filepath.Join(dir, "layer-"+toolsKey()+".tar.zst")
	if err := os.Truncate(p, 1); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := Build(t.Context(), o); !errors.Is(err, ErrMissingTool) || !strings.Contains(err.Error(), "apt-get install -y npm") {
		t.Errorf("damaged layer: %v", err)
	}
}

// checkArchive reads an archive as an importer does: from the index down to every blob's digest.
func checkArchive(t *testing.T, r Result) {
	t.Helper()
	f, err := os.Open(r.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, blobs := readTar(t, f)
	var layout struct{ ImageLayoutVersion string }
	if err := json.Unmarshal([]byte(blobs["oci-layout"]), &layout); err != nil || layout.ImageLayoutVersion != "1.0.0" {
		t.Errorf("oci-layout: %q %v", blobs["oci-layout"], err)
	}
	blob := func(d v1.Descriptor) string {
		data, ok := blobs["blobs/sha256/"+d.Digest.Hex]
		if got, _, _ := v1.SHA256(strings.NewReader(data)); !ok || got != d.Digest || int64(len(data)) != d.Size {
			t.Fatalf("blob %s: %d bytes of %d, digest %s", d.Digest, len(data), d.Size, got)
		}
		return data
	}
	var index v1.IndexManifest
	if err := json.Unmarshal([]byte(blobs["index.json"]), &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("index: %v %q", err, blobs["index.json"])
	}
	m := index.Manifests[0]
	if m.Digest.String() != r.Digest || m.Annotations["io.containerd.image.name"] != r.Ref {
		t.Errorf("index names %s %v, want %s %s", m.Digest, m.Annotations, r.Digest, r.Ref)
	}
	var manifest v1.Manifest
	if err := json.Unmarshal([]byte(blob(m)), &manifest); err != nil {
		t.Fatal(err)
	}
	var cfg v1.ConfigFile
	if err := json.Unmarshal([]byte(blob(manifest.Config)), &cfg); err != nil {
		t.Fatal(err)
	}
	if cfg.Config.WorkingDir != ProjectDir || len(cfg.Config.Entrypoint) != 3 || len(cfg.RootFS.DiffIDs) != len(manifest.Layers) {
		t.Errorf("config: %+v", cfg)
	}
	if len(manifest.Layers) != len(r.Layers) {
		t.Errorf("%d layers, result has %d", len(manifest.Layers), len(r.Layers))
	}
	for _, l := range manifest.Layers {
		blob(l)
	}
}

func TestBuildSaysWhatIsMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Build(t.Context(), BuildOptions{CacheDir: t.TempDir()})
	switch {
	case os.Geteuid() != 0:
		if !errors.Is(err, ErrNotRoot) {
			t.Errorf("without root: %v", err)
		}
	case !errors.Is(err, ErrMissingTool) || !strings.Contains(err.Error(), "apt-get install -y mmdebstrap npm"):
		t.Errorf("without tools: %v", err)
	}
}

func TestHint(t *testing.T) {
	for said, want := range map[string]string{
		"W: GPG error: … NO_PUBKEY 6ED0E7B82643E131":                   "debian-archive-keyring",
		"Err:1 … Temporary failure resolving 'mirror.test'":            "--mirror",
		"dpkg: error: failed to write: No space left on device":        "1.5 GB",
		"exit status 25; it said:\n  E: something that we do not know": "",
	} {
		if got := hint(said); !strings.Contains(got, want) || (want == "") != (got == "") {
			t.Errorf("%q: %q, want %q", said, got, want)
		}
	}
}

func TestBuildsWaitForEachOther(t *testing.T) {
	dir := t.TempDir()
	seed(t, dir, baseKey(BuildOptions{}), toolsKey())
	c, err := openCache(t.Context(), dir, func() {})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Build(ctx, BuildOptions{CacheDir: dir}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a build got in beside another: %v", err)
	}
	waiting := make(chan struct{}, 100)
	done := make(chan error, 1)
	go func() {
		_, err := Build(t.Context(), BuildOptions{CacheDir: dir, Progress: func(Progress) { waiting <- struct{}{} }})
		done <- err
	}()
	<-waiting // it has said that it waits
	c.close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCancelledCommandEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", "echo started >&2; sleep 600 & wait")
	start := time.Now()
	err := run(cmd, func(string) { cancel() }, nil)
	if err == nil || !strings.Contains(err.Error(), "started") {
		t.Errorf("error: %v", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("took %s", took)
	}
}

func TestCloudflared(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self) // a Linux program at hand
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	mustWrite(t, filepath.Join(folder, "cloudflared-linux-amd64"), string(data), 0o755)
	mux := http.NewServeMux()
	mux.HandleFunc("/cloudflared", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(data) })
	mux.HandleFunc("/page", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>sorry</html>")) })
	srv := httptest.NewServer(mux)
	defer srv.Close()
	defer http.DefaultClient.CloseIdleConnections()

	var digest string
	for _, from := range []string{self, folder, srv.URL + "/cloudflared"} {
		dir := t.TempDir()
		seed(t, dir, baseKey(BuildOptions{}), toolsKey())
		r, err := Build(t.Context(), BuildOptions{CacheDir: dir, Cloudflared: from})
		if err != nil {
			t.Fatalf("%s: %v", from, err)
		}
		if len(r.LeftOut) != 0 || len(r.Layers) != 4 {
			t.Errorf("%s: %+v", from, r)
		}
		if digest != "" && r.Digest != digest {
			t.Errorf("%s: the same program, another digest", from)
		}
		digest = r.Digest
	}
	for _, from := range []string{t.TempDir(), filepath.Join(folder, "none"), srv.URL + "/page", srv.URL + "/404", "image.go"} {
		if _, err := Build(t.Context(), BuildOptions{CacheDir: t.TempDir(), Cloudflared: from}); err == nil {
			t.Errorf("%s was taken for cloudflared", from)
		}
	}
}
