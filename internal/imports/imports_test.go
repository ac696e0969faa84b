// Package imports holds the module's import rules, as a test.
package imports

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/cloudcode-dev/cloudcode/"

type pkg struct {
	ImportPath string
	Standard   bool
	GoFiles    []string
	Imports    []string
	Deps       []string
}

// load lists the module's packages without their tests.
func load(t *testing.T) map[string]pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Standard,GoFiles,Imports,Deps", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	pkgs := map[string]pkg{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs[strings.TrimPrefix(p.ImportPath, module)] = p
	}
	if len(pkgs) < 20 {
		t.Fatalf("only %d packages found: is this the module's root?", len(pkgs))
	}
	return pkgs
}

// below says whether a package is dir or below it.
func below(name, dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") }

// The processes talk over gRPC only: each can be replaced without the others.
func TestProcessesDoNotImportOneAnother(t *testing.T) {
	processes := []string{"server", "nodeagent", "gateway"}
	for name, p := range load(t) {
		for _, own := range processes {
			if !below(name, own) {
				continue
			}
			for _, dep := range p.Deps {
				dep, ours := strings.CutPrefix(dep, module)
				for _, other := range processes {
					if ours && other != own && below(dep, other) {
						t.Errorf("%s depends on %s: processes share proto/ and internal/ only", name, dep)
					}
				}
			}
		}
	}
}

// The domain must stay free of storage and transport.
func TestFleetImportsStandardLibraryOnly(t *testing.T) {
	for _, imported := range load(t)["server/fleet"].Imports {
		if first, _, _ := strings.Cut(imported, "/"); strings.Contains(first, ".") {
			t.Errorf("server/fleet imports %s: it may import the standard library only", imported)
		}
	}
}

// Implementations are chosen in one place; all else knows their interfaces.
func TestOnlyWiringImportsImplementations(t *testing.T) {
	allowed := map[string][]string{
		"server/store/boltstore":       {"server"},
		"nodeagent/runtime/containerd": {"nodeagent", "cmd/cloudcode/internal/cli"}, // cli: `image import|list` on the node itself
		"nodeagent/mount/tigrisfs":     {"nodeagent"},
		"nodeagent/mount/rclone":       {"nodeagent"},
	}
	for name, p := range load(t) {
		for _, imported := range p.Imports {
			imported = strings.TrimPrefix(imported, module)
			users, restricted := allowed[imported]
			if restricted && !slices.Contains(users, name) && path.Dir(name) != imported {
				t.Errorf("%s imports %s: only %v may", name, imported, users)
			}
		}
	}
}

// The container client pulls in most of the module's dependencies: a server or
// gateway built alone should not carry it.
func TestControlPlaneIsFreeOfContainerd(t *testing.T) {
	for name, p := range load(t) {
		if !below(name, "server") && !below(name, "gateway") && !below(name, "internal") || strings.HasPrefix(name, "internal/e2e") || strings.HasPrefix(name, "internal/fleettest") {
			continue
		}
		for _, dep := range p.Deps {
			if strings.HasPrefix(dep, "github.com/containerd/containerd/v2") {
				t.Errorf("%s depends on %s", name, dep)
				break
			}
		}
	}
}

// One package knows the S3 library, its retries and its errors; all else knows objstore.
func TestOnlyObjstoreKnowsTheS3Library(t *testing.T) {
	for name, p := range load(t) {
		for _, imported := range p.Imports {
			if strings.HasPrefix(imported, "github.com/minio/minio-go/") && name != "internal/objstore" && name != "internal/s3test" {
				t.Errorf("%s imports %s: use internal/objstore", name, imported)
			}
		}
	}
}

// What server and node daemon share must not lead from one to the other.
func TestSharedStoragePackagesKnowNoProcess(t *testing.T) {
	pkgs := load(t)
	for _, name := range []string{"internal/objstore", "internal/storage", "internal/checkpoint"} {
		p, ok := pkgs[name]
		if !ok {
			t.Errorf("%s is not there: correct this test", name)
		}
		for _, dep := range p.Deps {
			dep, ours := strings.CutPrefix(dep, module)
			if ours && (below(dep, "server") || below(dep, "nodeagent") || below(dep, "gateway") || below(dep, "proto")) {
				t.Errorf("%s depends on %s: it is for every process, and speaks no protocol", name, dep)
			}
		}
	}
}
