import type { PackageInfo } from "../model/package.ts";
import { element, megabytes } from "./elements.ts";

/** What `expe-edge web` writes beside the packages. */
export interface Site {
  title: string;
  /** Whether the site holds onnxruntime's WebGPU build. */
  webgpu: boolean;
  /** The one to begin with first. */
  packages: PackageInfo[];
}

export async function readSite(): Promise<Site> {
  const response = await fetch("packages/list.json");
  if (!response.ok) throw new Error(`packages/list.json: ${response.status}`);
  return response.json();
}

/** Show the packages as a choice of one; the first is chosen. */
export function showPackages({ packages }: Site): void {
  element("packages").replaceChildren(...packages.map(card));
}

/** The package that is chosen. */
export function chosenPackage({ packages }: Site): PackageInfo {
  const chosen = document.querySelector<HTMLInputElement>("input[name=package]:checked");
  return packages[Number(chosen?.value ?? 0)]!;
}

function card(info: PackageInfo, index: number): HTMLElement {
  const radio = document.createElement("input");
  Object.assign(radio, { type: "radio", name: "package", value: String(index), checked: index === 0 });
  const label = document.createElement("label");
  label.className = "card";
  const size = Object.values(info.files).reduce((sum, file) => sum + file.bytes, 0);
  label.append(radio, span("size", megabytes(size)), span("name", info.name), span("note", info.note));
  return label;
}

function span(kind: string, text: string): HTMLSpanElement {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  return made;
}
